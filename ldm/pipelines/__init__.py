"""What users call.

text_to_image.py  LDMPipeline
upscale.py        LDMUpscalePipeline: small pictures in, large ones out
cascade.py        a pipeline with an upscaler behind it
student.py        a pipeline with a student of few steps behind it
conditions.py     prompts, classes, second pictures => conditions of the denoiser
editing.py        pictures to change, masks, larger canvases
weaker.py         the weaker model of autoguidance
walks.py          pictures between two prompts or seeds
inputs.py         arguments, checked against their ranges and against the model
loading.py        a pipeline and its folder
"""

from ldm.system.importing import collector_at_rest, transformers_quiet


def import_networks() -> None:
    """Import LDMPipeline with all that it needs. Whoever imports parts of it afterwards finds them loaded.

    Quietly: transformers' remarks at this import concern torchvision, which nothing here needs.
    """
    with collector_at_rest(), transformers_quiet():
        import ldm.pipelines.text_to_image  # noqa: F401
