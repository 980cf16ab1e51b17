"""Devices that need not be at hand: what bounds a decode step on each, from published figures.

A GPU's bandwidth and rate are those of its maker: the rate of 16-bit tensor cores that accumulate in 32 bits, without
sparsity, halved, because a product and its addition are two operations. The accelerators are laws of time against
precision (``precision_laws``). So that they can be compared, all but BitMoD have the size of one machine: 128 products
of 16 bits a cycle, which Loom's evaluation takes as its equal, at 1 GHz, with weights from one stack of HBM2.
"""

from dataclasses import dataclass

from runtime.precision_laws import FULL_BITS, LAWS, Law


@dataclass(frozen=True, kw_only=True)
class DeviceModel:
    """What a modelled latency reckons with.

    Args:
        description: What the device is.
        read_bytes_per_s: Bandwidth of its memory.
        products_per_s: Products of two 16-bit numbers a second.
        law: Key of ``LAWS``.
        activation_bits: Bits of the activations that it multiplies by.
        source: Where the figures are from.
    """

    description: str
    read_bytes_per_s: float
    products_per_s: float
    source: str
    law: str = "bit-parallel"
    activation_bits: int = FULL_BITS

    @property
    def work(self) -> Law:
        """The law itself."""
        return LAWS[self.law]


def _gpu(description: str, terabytes_per_s: float, teraflops: float, source: str) -> DeviceModel:
    return DeviceModel(
        description=description,
        read_bytes_per_s=terabytes_per_s * 1e12,
        products_per_s=teraflops * 1e12 / 2,
        source=source,
    )


def _accelerator(description: str, law: str, source: str) -> DeviceModel:
    return DeviceModel(
        description=f"{description}, 8-bit activations",
        read_bytes_per_s=0.256e12,
        products_per_s=128e9,
        law=law,
        activation_bits=8,
        source=f"{source}; size: 128 products of 16 bits a cycle (arXiv:1706.07853) at 1 GHz, HBM2 (JEDEC JESD235A)",
    )


DEVICE_MODELS: dict[str, DeviceModel] = {
    "t4": _gpu("NVIDIA T4", 0.320, 65.0, "NVIDIA T4 datasheet"),
    "a10": _gpu("NVIDIA A10", 0.600, 125.0, "NVIDIA A10 datasheet"),
    "a100-sxm-80gb": _gpu("NVIDIA A100 SXM 80 GB", 2.039, 312.0, "NVIDIA A100 80 GB datasheet"),
    "l4": _gpu("NVIDIA L4", 0.300, 121.0, "NVIDIA L4 datasheet (half of the rate with sparsity)"),
    "l40s": _gpu("NVIDIA L40S", 0.864, 362.0, "NVIDIA L40S datasheet"),
    "rtx-3090": _gpu("NVIDIA RTX 3090", 0.936, 71.0, "NVIDIA Ampere GA102 GPU architecture whitepaper"),
    "rtx-4090": _gpu("NVIDIA RTX 4090", 1.008, 165.2, "NVIDIA Ada GPU architecture whitepaper"),
    "h100-pcie": _gpu("NVIDIA H100 PCIe", 2.0, 756.0, "NVIDIA H100 datasheet (half of the rate with sparsity)"),
    "h100-sxm": _gpu("NVIDIA H100 SXM", 3.35, 989.4, "NVIDIA H100 Tensor Core GPU architecture whitepaper"),
    "h200": _gpu("NVIDIA H200 SXM", 4.8, 989.4, "NVIDIA H200 datasheet"),
    "b200": _gpu(
        "NVIDIA B200", 8.0, 2250.0, "NVIDIA DGX B200 datasheet, an eighth of it, half of the rate with sparsity"
    ),
    "mi300x": _gpu("AMD Instinct MI300X", 5.3, 1307.4, "AMD Instinct MI300X datasheet"),
    "loom": _accelerator("Loom", "bit-serial", "arXiv:1706.07853"),
    "dpred": _accelerator("DPRed", "activation-serial", "arXiv:1804.06732"),
    "laconic": _accelerator("Laconic", "signed-digit", "arXiv:1805.04513"),
    "bit-tactical": _accelerator("Bit-Tactical, TCLp", "zero-skipping", "arXiv:1803.03688"),
    "bitmod": DeviceModel(
        description="BitMoD, 64 x 16 elements of 4 products, 16-bit activations",
        read_bytes_per_s=32e9,
        products_per_s=512e9,
        law="tiled-serial",
        source="arXiv:2411.11745 and its simulator (decoding array, 256 bits of DRAM a cycle), at 1 GHz",
    ),
}


def find_device_model(name: str) -> DeviceModel:
    """Returns a device of ``DEVICE_MODELS``.

    Raises:
        ValueError: If there is none of that name.
    """
    if name not in DEVICE_MODELS:
        msg = f"a device must be a known name: got '{name}'. Known devices: {', '.join(DEVICE_MODELS)}."
        raise ValueError(msg)
    return DEVICE_MODELS[name]


def describe_devices() -> list[dict[str, str | float]]:
    """Returns the table of devices, one row each."""
    return [
        {
            "name": name,
            "description": device.description,
            "gigabytes_per_s": round(device.read_bytes_per_s / 1e9, 3),
            "gigaproducts_per_s": round(device.products_per_s / 1e9, 3),
            "law": device.law,
            "source": device.source,
        }
        for name, device in DEVICE_MODELS.items()
    ]
