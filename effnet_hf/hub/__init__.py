"""The Hugging Face Hub: the model card of a checkpoint folder, and its upload."""

from .card import CardFacts, describe_preprocessing, render_card, software_versions


__all__ = ["CardFacts", "describe_preprocessing", "render_card", "software_versions"]
