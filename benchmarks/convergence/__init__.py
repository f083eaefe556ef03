"""The convergence study: one small model, the same seeds and batches for every optimizer.

python -m benchmarks.convergence list
python -m benchmarks.convergence run final
python -m benchmarks.convergence report
"""
