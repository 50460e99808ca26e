"""Block replacement: a decoder layer goes, and something much smaller stands in for it.

modules     what a replaced layer computes: shared, factored, mapped
blocks      what config.json says of it
site        a removed layer while stand-ins for it are fitted: both paths' hidden states
maps        linear maps: folded into the layer before, or of low rank behind it
layers      stand-ins that are layers: shared weights with adapters, own weights factored
pairs       whose weights are shared in the published method
choose      which stand-in a layer gets
positions   the layers of the compressed model, and the tensors of each
run         the run, in the order in which things happen
extend      layers repeated with adapters of their own
dense       an ordinary checkpoint out of shared blocks, where there is one
"""
