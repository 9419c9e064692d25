"""Language models as pure JAX functions: a shared decoder, one file per family, and a loader of HuggingFace folders.

Knows nothing of stores, tokenizers or hosts: it imports neither `actstore` nor `transformers`.
"""

from extract.models.config import DecoderConfig as DecoderConfig
from extract.models.errors import ModelError as ModelError
from extract.models.loading import load_model as load_model
from extract.models.model import Model as Model
from extract.models.model import Params as Params
from extract.models.sites import Tap as Tap
from extract.models.sites import check_taps as check_taps
from extract.models.sites import default_layers as default_layers
from extract.models.sites import site_widths as site_widths
