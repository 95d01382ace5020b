"""The arithmetic of a large run, computed and not measured: memory and work of an image, traffic of a step.

    python -m benchmarks.cost.cluster [--preset base] [--image_size 448] [--gpus 64] [--batch_size 16]

Operations and the tensors that autograd keeps are counted on PyTorch's meta device, where nothing is computed. How fast
a GPU or a network is, is an assumption that the command takes.
"""

import argparse
import sys

import torch

from benchmarks.timing import CountMultiplyAdds
from modeling_hsvlt import HSVLTConfig, HSVLTForImageClassification


def kept_for_backward(model, images: int, image_size: int) -> int:
    """Bytes of distinct tensors, weights apart, that autograd keeps for the backward pass of one forward."""
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage  # held, so that no other storage takes its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        inputs = torch.empty(images, 3, image_size, image_size, device="meta")
        model(pixel_values=inputs).logits.sum()
    return sum(storage.nbytes() for storage in kept.values())


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="base")
    parser.add_argument("--image_size", type=int, default=448)
    parser.add_argument("--labels", type=int, default=80)
    parser.add_argument("--gpus", type=int, default=64)
    parser.add_argument("--batch_size", type=int, default=16, help="images a GPU and step")
    parser.add_argument("--tflops", type=float, default=312, help="assumed peak of a GPU in bf16 (A100: 312)")
    parser.add_argument("--share", type=float, default=0.3, help="assumed part of the peak that is reached")
    parser.add_argument("--gigabytes", type=float, default=25, help="assumed GB/s of network a GPU (200 Gbit/s: 25)")
    args = parser.parse_args(argv)
    with torch.device("meta"):
        config = HSVLTConfig.preset(args.preset, num_labels=args.labels, image_size=args.image_size)
        model = HSVLTForImageClassification(config).train()
    with CountMultiplyAdds() as counter:
        model(pixel_values=torch.empty(1, 3, args.image_size, args.image_size, device="meta"))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    two, four = (kept_for_backward(model, images, args.image_size) for images in (2, 4))
    image = (four - two) / 2 / 2**20
    work = 3 * 2 * counter.total  # backward is twice forward
    step = args.batch_size * work / (args.tflops * 1e12 * args.share)
    traffic = 2 * (args.gpus - 1) / args.gpus * 4 * parameters  # ring all-reduce of fp32 gradients
    network = traffic / (args.gigabytes * 1e9)
    fixed = {"weights": 4, "gradients": 4, "AdamW's moments": 8, "weight average": 4}
    print(f"HSVLT {args.preset}, {args.image_size} px, {args.labels} labels: {parameters / 1e6:.1f} M parameters\n")
    print("| a GPU | computed |\n|---|---|")
    for name, size in fixed.items():
        print(f"| {name}, fp32 | {size * parameters / 2**30:.2f} GiB |")
    print(f"| all of these with FSDP2 over {args.gpus} | {20 * parameters / args.gpus / 2**30:.3f} GiB |")
    print(f"| kept for backward, an image, fp32 | {image:,.0f} MiB |")
    print(f"| the same in bf16, at the least | {image / 2:,.0f} MiB |")
    print(f"| {args.batch_size} images in bf16 | {args.batch_size * image / 2 / 2**10:.1f} GiB |")
    print(f"| work of an image, forward and backward | {work / 1e12:.2f} TFLOP |")
    print(f"| gradients sent by a GPU in a step (DDP) | {traffic / 2**30:.2f} GiB |")
    print("\n| assumed | computed from it |\n|---|---|")
    print(f"| {args.share:.0%} of {args.tflops:g} TFLOP/s | {args.batch_size / step:,.0f} images/s a GPU |")
    everywhere = args.gpus * args.batch_size / step
    print(f"| the same on {args.gpus} GPUs | {everywhere:,.0f} images/s, {step:.2f} s a step |")
    print(f"| {args.gigabytes:g} GB/s of network a GPU | {network:.3f} s a step, {network / step:.0%} of its work |")
    print(f"| images of 60 KB on disk | {everywhere * 60e3 / 1e9:.2f} GB/s to read |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
