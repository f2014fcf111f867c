"""Nothing outgrows its budget: file 400 lines, function 60, kernel 120."""

from __future__ import annotations

from tests.house import rules


def function_of(num_lines: int, head: str = "") -> str:
    return head + "def grow():\n" + "    x = 1\n" * (num_lines - 1)


def test_every_module_keeps_its_budget():
    wrong = [line for module, source in rules.modules().items() for line in rules.budget_violations(module, source)]
    assert not wrong, "\n" + "\n".join(wrong)


def test_a_file_over_budget_is_refused():
    assert rules.budget_violations("m", "x = 1\n" * 400) == []
    assert len(rules.budget_violations("m", "x = 1\n" * 401)) == 1


def test_a_function_over_budget_is_refused_also_inside_a_class():
    assert rules.budget_violations("m", function_of(60)) == []
    assert len(rules.budget_violations("m", function_of(61))) == 1
    inside = "class C:\n" + "".join(f"    {line}\n" for line in function_of(61).splitlines())
    assert len(rules.budget_violations("m", inside)) == 1


def test_a_kernel_has_twice_the_budget_and_no_more():
    for head in (
        "@triton.jit\n",
        "@gluon.jit\n",
        "@triton.autotune(configs=[])\n@triton.jit(do_not_specialize=['n'])\n",
    ):
        assert rules.budget_violations("m", function_of(120, head)) == []
        assert len(rules.budget_violations("m", function_of(121, head))) == 1
    assert len(rules.budget_violations("m", function_of(61, "@torch.compile\n"))) == 1


def test_a_docstring_does_not_count():
    source = 'def f():\n    """' + "word\n" * 80 + '    """\n' + "    x = 1\n" * 59
    assert rules.budget_violations("m", source) == []
    assert len(rules.budget_violations("m", source + "    x = 1\n")) == 1
