import torch
from safetensors.torch import load_file

from maskmatch_scale.export.tensors import save_tensors


def test_others_may_read_an_export_as_far_as_the_umask_lets_them(tmp_path):
    (tmp_path / "usual").touch()
    path = tmp_path / "model.safetensors"
    for value in (0.0, 1.0):
        save_tensors({"weight": torch.full((2,), value)}, path)
        assert load_file(path)["weight"].tolist() == [value, value]
        assert path.stat().st_mode == (tmp_path / "usual").stat().st_mode
