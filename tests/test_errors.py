"""The package's root imports without torch; a user's error is a ValueError."""

import subprocess
import sys

from rlhf_ray.errors import UserError


def test_a_user_error_is_a_value_error_with_its_line():
    assert isinstance(UserError("field=1 must be 2"), ValueError)
    assert str(UserError("field=1 must be 2")) == "field=1 must be 2"


def test_root_and_errors_import_without_torch_or_ray():
    program = "import sys, rlhf_ray, rlhf_ray.errors; print(sorted({'torch', 'ray'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
