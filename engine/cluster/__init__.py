"""Work spread over Ray: windows of problems to workers (pool.py, worker.py), and starting Ray (ray_start.py)."""
