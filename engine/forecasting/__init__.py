"""Forecasts for problems whose rows are old: their cosine, gradient norm and pass rate now."""
