"""What the adapters of Megatron-LM v2.2, v2.5 and v3.0.2 share; each of them names its version.

layer.py holds the layer, model.py puts it into a model, schedule.py carries its balance loss through the host's
schedules, data_parallel.py and gradients.py reduce, measure and clip gradients, checkpoint.py saves and loads experts,
install.py puts all of it into the running host. adapter.py has the functions of a version's module.
"""
