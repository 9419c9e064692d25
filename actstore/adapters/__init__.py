"""Minibatches of a store in the form that a trainer takes: one module per library, which imports that library alone.

Nothing else in actstore imports them, and importing this package imports none.
"""
