"""paired_collator: what a recipe makes of its rows, without its models."""

from __future__ import annotations

from .errors import InputError
from .pretrained import load_processor
from .recipe import Recipe
from .streams import PairedCollator, SharedVocabulary, StreamEncoder, same_processing
from .teachers import TeacherOptions


def paired_collator(recipe: Recipe) -> PairedCollator:
    """The encoders of a recipe's models, their shared vocabulary, and one encoding where it serves both.

    Raises:
        InputError: a processor cannot be used, or the vocabularies share too little.
    """
    processor = load_processor(recipe.student.path, trust_remote_code=recipe.student.trust_remote_code)
    mine = StreamEncoder(processor, recipe.data)
    if not recipe.all_teachers or not recipe.objective.objective().uses_teacher:
        return PairedCollator(mine, options=recipe.data)
    theirs, *others = [_encoder(options, recipe) for options in recipe.all_teachers]
    for options, other in zip(recipe.teachers[1:], others, strict=True):
        if not same_processing(theirs, other):
            raise InputError(
                f"teachers: {options.path} does not read rows as {recipe.teachers[0].path} does: several teachers need "
                "one tokenizer, chat template and processor, and the same system prompt and image settings"
            )
    vocabulary = SharedVocabulary(mine, theirs)
    return PairedCollator(mine, mine if same_processing(mine, theirs) else theirs, vocabulary, recipe.data)


def _encoder(options: TeacherOptions, recipe: Recipe) -> StreamEncoder:
    processor = load_processor(
        options.path, trust_remote_code=options.trust_remote_code, image_settings=options.image_settings
    )
    return StreamEncoder(processor, recipe.data, system=options.system)
