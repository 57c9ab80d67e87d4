"""Work spread over Ray: windows of problems to workers, results in order (pool.py); starting Ray (ray_start.py)."""
