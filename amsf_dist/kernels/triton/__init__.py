"""The step as Triton kernels: the files below are the only ones that import Triton.

    noise.py, memory.py, arithmetic.py    what storages, random numbers and rules do, for one tile
    measure.py, move.py                   the kernels
    tables.py                             which program works where, as tables on the device
    stepper.py                            the launches

Nothing is imported before a kernel is chosen (amsf_dist/kernels/choice.py).
"""
