"""Files that run elsewhere: ONNX for ONNX Runtime and OpenVINO, programs of torch.export."""

from hap_hf.export.export import Format, check_installed, export

__all__ = ["Format", "check_installed", "export"]
