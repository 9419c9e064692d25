"""The demo: a real model fetched as a Python package, a small SAE trainer, and what to look at afterwards."""
