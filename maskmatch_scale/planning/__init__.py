"""What a run will need, before anything is started: memory, time, network, data; and settings that fit.

Nothing here touches a GPU, a process group or the weights of a model: models are on the meta device.
"""
