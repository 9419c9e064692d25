"""extract: runs a language model over documents and stores its activations.

`open_documents`, `make_plan` and `run` are the whole path; JAX is imported when the first of them is used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from extract.additions import append_documents, append_layers
    from extract.chat import ChatTemplate, load_chat_template
    from extract.completions import CompletionPlan, Written, plan_completions, write_completions
    from extract.conversation import chat_text
    from extract.documents import Document, Fields
    from extract.hooked import HookedModel, create_model_with_hooks, generate_with_layer_activations
    from extract.loaded import load_model
    from extract.loop import Progress, run
    from extract.models.generate import Generated, generate
    from extract.models.sampling import Sampling
    from extract.named import model_folder, tokenizer_folder
    from extract.plan import ExtractPlan
    from extract.planning import make_plan
    from extract.positions import extract_specific_layer_positions
    from extract.sources import Documents, open_documents

_WHERE = {
    "ChatTemplate": "extract.chat",
    "CompletionPlan": "extract.completions",
    "Document": "extract.documents",
    "Documents": "extract.sources",
    "ExtractPlan": "extract.plan",
    "Fields": "extract.documents",
    "Generated": "extract.models.generate",
    "HookedModel": "extract.hooked",
    "Progress": "extract.loop",
    "Sampling": "extract.models.sampling",
    "Written": "extract.completions",
    "append_documents": "extract.additions",
    "append_layers": "extract.additions",
    "chat_text": "extract.conversation",
    "create_model_with_hooks": "extract.hooked",
    "extract_specific_layer_positions": "extract.positions",
    "generate": "extract.models.generate",
    "generate_with_layer_activations": "extract.hooked",
    "load_chat_template": "extract.chat",
    "load_model": "extract.loaded",
    "make_plan": "extract.planning",
    "model_folder": "extract.named",
    "open_documents": "extract.sources",
    "plan_completions": "extract.completions",
    "run": "extract.loop",
    "tokenizer_folder": "extract.named",
    "write_completions": "extract.completions",
}
__all__ = [
    "ChatTemplate", "CompletionPlan", "Document", "Documents", "ExtractPlan", "Fields", "Generated", "HookedModel",
    "Progress", "Sampling", "Written", "append_documents", "append_layers", "chat_text", "create_model_with_hooks",
    "extract_specific_layer_positions", "generate", "generate_with_layer_activations", "load_chat_template",
    "load_model", "make_plan", "model_folder", "open_documents", "plan_completions", "run", "tokenizer_folder",
    "write_completions",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used, so that `actstore --help` does not wait for JAX."""
    if name not in _WHERE:
        raise AttributeError(f"module 'extract' has no attribute {name!r}")
    return getattr(import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    """The public names, for completion at a prompt."""
    return __all__
