"""Sweeps: what to run (plan.py), running it (launch.py, slurm.py), and showing it (board.py)."""
