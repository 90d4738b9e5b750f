import pytest

pytest_plugins = ["pytester"]

CASES = """
    import pytest

    def test_passes():
        pass

    @pytest.mark.skipif(True, reason="no GPU here")
    def test_of_a_gpu():
        raise AssertionError

    @pytest.mark.xfail(reason="a known bug")
    def test_with_a_known_bug():
        raise AssertionError

    def test_without_a_program():
        pytest.skip("PostgreSQL is not installed")
"""


def test_only_skips_for_lack_of_a_gpu_are_accepted(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(CASES)
    pytester.runpytest_inprocess("-p", "tests.no_skips").assert_outcomes(passed=1, skipped=1, xfailed=1, failed=1)
    pytester.runpytest_inprocess().assert_outcomes(passed=1, skipped=2, xfailed=1)


def test_a_file_that_is_skipped_as_a_whole_fails(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("import pytest\npytest.skip('Chromium is not installed', allow_module_level=True)")
    result = pytester.runpytest_inprocess("-p", "tests.no_skips")
    assert result.ret == pytest.ExitCode.INTERRUPTED
    result.stdout.fnmatch_lines("*no test may be skipped here*Chromium is not installed*")
