"""Files that run elsewhere: ONNX for ONNX Runtime and OpenVINO, programs of torch.export."""

from hap_hf.export.export import Format, export

__all__ = ["Format", "export"]
