"""The one exception of the model code.

`extract.models` knows nothing of `actstore`, so it cannot use the exception tree there. `ModelError` is a `ValueError`
because every case is an argument, a file or a configuration that is wrong: nothing was computed yet.
"""


class ModelError(ValueError):
    """A model folder, a configuration, a site or a layer is wrong, or not supported.

    The message says what was found, what was expected and what to do next.
    """
