"""What users call.

text_to_image.py  LDMPipeline
inputs.py         arguments, checked against their ranges and against the model
loading.py        a name => a folder; a saved folder says nothing of where it was loaded
"""

from ldm.system.importing import collector_at_rest


def import_networks() -> None:
    """Import LDMPipeline with all that it needs. Whoever imports parts of it afterwards finds them loaded."""
    with collector_at_rest():
        import ldm.pipelines.text_to_image  # noqa: F401
