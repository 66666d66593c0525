"""How a processor is called."""

from __future__ import annotations

from fastmask.processor import cpu_fields, processor


def test_a_processor_is_named_with_its_model(tmp_path):
    """Numbers of two generations of processors that are called alike stand under one name."""
    info = tmp_path / "cpuinfo"
    info.write_text("processor\t: 0\ncpu family\t: 26\nmodel\t\t: 2\nmodel name\t: AMD EPYC\n\nprocessor\t: 1\n")
    assert processor(info) == "AMD EPYC (family 26, model 2)"


def test_elsewhere_it_has_a_name_all_the_same(tmp_path):
    """Where the system says nothing of the processor, Python's name of it stands."""
    assert cpu_fields(tmp_path / "none") == {}
    assert processor(tmp_path / "none")
