"""Studies of saferl: what is measured, how, and what came out.

python -m benchmarks                   # the studies
python -m benchmarks limits --report   # tables and plots of the committed results
"""
