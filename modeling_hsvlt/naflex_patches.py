"""What SigLIP 2's NaFlex towers read: the patches of an image, in place of the image."""

import torch


def naflex_inputs(pixel_values: torch.Tensor, patch_size: tuple[int, int]) -> dict[str, torch.Tensor | None]:
    """The arguments of `Siglip2VisionModel` for images of one size, of any aspect ratio.

    As transformers' `Siglip2ImageProcessor` makes them, but without its padding to a number of patches, which its mask
    hides: a batch of one size needs neither.

    Args:
        pixel_values (`torch.Tensor` of shape `(B, C, H, W)`): images; what follows the last whole patch is left out.
        patch_size: Height and width of a patch (p, q), in pixels.

    Returns:
        `pixel_values` `(B, H // p * W // q, p * q * C)`, row by row, and `spatial_shapes`, rows and columns.
    """
    rows, columns = pixel_values.shape[-2] // patch_size[0], pixel_values.shape[-1] // patch_size[1]
    patches = pixel_values[..., : rows * patch_size[0], : columns * patch_size[1]]
    patches = patches.unflatten(3, (columns, -1)).unflatten(2, (rows, -1)).permute(0, 2, 4, 3, 5, 1)
    return {
        "pixel_values": patches.flatten(3).flatten(1, 2),
        "pixel_attention_mask": None,
        # One grid for all images, so positions of one: they are added to each.
        "spatial_shapes": torch.tensor([[rows, columns]], device="cpu"),
    }
