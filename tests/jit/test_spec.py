"""JitSpec: a value that goes through JSON, and the source made from it."""

import json

import pytest

from inductor_ext.jit import JitSpec

SPEC = JitSpec(
    "fp8_downcast",
    "fp8_downcast/fp8_downcast.cuh",
    (("run", "inductor_ext::fp8_downcast<8, true>::run"), ("info", "inductor_ext::info")),
    arch="sm_90a",
    flags=("-DX=1",),
)


def test_json_round_trip_gives_an_equal_spec():
    again = JitSpec.from_dict(json.loads(json.dumps(SPEC.to_dict())))
    assert again == SPEC and hash(again) == hash(SPEC)


def test_translation_unit_keeps_template_commas_out_of_the_macro():
    assert SPEC.translation_unit() == (
        "#include <tvm/ffi/function.h>\n"
        '#include "fp8_downcast/fp8_downcast.cuh"\n'
        "TVM_FFI_DLL_EXPORT_TYPED_FUNC(run, (inductor_ext::fp8_downcast<8, true>::run));\n"
        "TVM_FFI_DLL_EXPORT_TYPED_FUNC(info, (inductor_ext::info));\n"
    )


def test_describe_is_one_line_naming_kernel_target_and_flags():
    text = SPEC.describe()
    assert "\n" not in text
    for part in ("fp8_downcast", "sm_90a", "<8, true>", "-DX=1"):
        assert part in text


def test_gencode_names_one_exact_target():
    assert SPEC.gencode() == "-gencode=arch=compute_90a,code=sm_90a"


@pytest.mark.parametrize(
    "change",
    [
        {"name": "a/b"},
        {"source": "/etc/x.cuh"},
        {"source": "../x.cuh"},
        {"arch": "90a"},
        {"exports": ()},
        {"exports": (("not a name", "f"),)},
    ],
)
def test_a_spec_that_cannot_be_built_is_refused(change):
    with pytest.raises(ValueError, match="JitSpec"):
        JitSpec.from_dict({**SPEC.to_dict(), **change})
