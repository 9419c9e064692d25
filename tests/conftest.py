"""Switches the shape checks on, and makes the small stores that tests share."""

from jaxtyping import install_import_hook

install_import_hook(["actstore", "extract"], "typecheck.checked")  # before anything imports them
