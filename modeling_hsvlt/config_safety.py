"""What a downloaded config.json must not ask for."""


def refuse_kernel_repositories(config) -> None:
    """Refuse an attention implementation that is the name of a repository, in a configuration and its parts.

    transformers fetches such a kernel and runs it (`attn_implementation="org/name"`). Whoever loads a model may ask for
    that, as an argument of `from_pretrained`; the file that came with the weights may not.

    Raises:
        ValueError: naming what the file asks for.
    """
    for part in (config, *(getattr(config, name, None) for name in config.sub_configs)):
        asked = getattr(part, "_attn_implementation", None)
        if "/" in str(asked or ""):
            raise ValueError(
                f"This configuration asks for the attention kernel {asked!r}, which is code in another repository: "
                "take it out of config.json; if you trust it, give attn_implementation to from_pretrained yourself."
            )
