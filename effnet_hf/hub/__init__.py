"""The Hugging Face Hub: the model card of a checkpoint folder, its upload, and downloads; a Space of it in `space`."""

from .card import CardFacts, describe_preprocessing, render_card, software_versions
from .transfer import download, push_folder


__all__ = ["CardFacts", "describe_preprocessing", "download", "push_folder", "render_card", "software_versions"]
