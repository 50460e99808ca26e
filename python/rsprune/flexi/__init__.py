"""Block replacement: a decoder layer goes, and something much smaller stands in for it.

What a replaced layer computes is in `rsprune.replaced_layers`, what config.json says of it in
`rsprune.replaced`: whoever loads a model needs those, and nothing from here.

site        a removed layer while stand-ins for it are fitted: both paths' hidden states
maps        linear maps: folded into the layer before, or of low rank behind it
layers      stand-ins that are layers: shared weights with adapters, own weights factored
pairs       whose weights are shared in the published method
recover     a stand-in, fitted further by Adam
choose      which stand-in a layer gets
replace     a layer that stays, and what stands in for the removed ones behind it
positions   the layers of the compressed model, and the tensors of each
plan        memory, disk and refusals
run         the run, in the order in which things happen
extend      layers repeated with adapters of their own
dense       an ordinary checkpoint out of shared blocks, where there is one
"""
