"""Depth pruning: whole decoder layers go, the rest of the checkpoint stays as it is.

views       two views of a text: as it is, and with letters changed
walk        windows on their way through the layers that are still there
gradients   loss gradients backwards through the layers, one layer in memory
losses      the loss of the model without each of its layers
scores      the metrics, and the methods that are made of them
plan        memory, disk and refusals
remove      the lowest layer goes, again and again
fold        the removed span's linear map, folded into the layer before it
cut         config.json and tensor names of what is left
run         the run, in the order in which things happen
survey      scores of all layers by all metrics, nothing removed
picture     scores as a page of HTML
"""
