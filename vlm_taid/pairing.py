"""paired_collator: what a recipe makes of its rows, without its models."""

from __future__ import annotations

from .pretrained import load_processor
from .recipe import Recipe
from .streams import PairedCollator, SharedVocabulary, StreamEncoder, same_processing


def paired_collator(recipe: Recipe) -> PairedCollator:
    """The encoders of a recipe's models, their shared vocabulary, and one encoding where it serves both.

    Raises:
        InputError: a processor cannot be used, or the vocabularies share too little.
    """
    processor = load_processor(recipe.student.path, trust_remote_code=recipe.student.trust_remote_code)
    mine, options = StreamEncoder(processor, recipe.data), recipe.teacher
    if options is None or not recipe.objective.objective().uses_teacher:
        return PairedCollator(mine, options=recipe.data)
    processor = load_processor(
        options.path, trust_remote_code=options.trust_remote_code, image_settings=options.image_settings
    )
    theirs = StreamEncoder(processor, recipe.data, system=options.system)
    vocabulary = SharedVocabulary(mine, theirs)
    return PairedCollator(mine, mine if same_processing(mine, theirs) else theirs, vocabulary, recipe.data)
