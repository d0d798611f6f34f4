"""Writing at keys: the worked numbers of the specifications, identities, and what other keys notice."""

from __future__ import annotations

import pytest
import torch

from llmsurgery.compute import associative
from llmsurgery.compute.associative import (
    apply_matrix,
    insert_factors,
    moment_solve,
    oriented,
    project_out,
    redirect_factors,
    update_norm,
    written_share,
)
from llmsurgery.errors import InputError

W = torch.tensor([[1.0, 0, 2], [0, 1, -1]], dtype=torch.float64)
C = torch.tensor([[2, 0.5, 0], [0.5, 1, 0.2], [0, 0.2, 1.5]], dtype=torch.float64)
KEY = torch.tensor([[1.0], [2], [1]], dtype=torch.float64)
VALUE = torch.tensor([[0.0], [3]], dtype=torch.float64)


def close(found: torch.Tensor, wanted: object, atol: float = 1e-6) -> None:
    torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float64), atol=atol, rtol=0)


def test_rome_worked_numbers() -> None:
    u = moment_solve(C)(KEY)
    close(u[:, 0], [0.0235756, 1.9056974, 0.4125737])
    assert float((KEY.T @ u)[0, 0]) == pytest.approx(4.2475442, abs=1e-6)
    left, right = insert_factors(KEY, VALUE - W @ KEY, C, None)
    changed = W + left @ right
    close(changed, [[0.983349, -1.345976, 1.708603], [0.011101, 1.897317, -0.805735]])
    torch.testing.assert_close(changed @ KEY, VALUE)


def test_memit_worked_numbers() -> None:
    residual = VALUE - W @ KEY
    rome, memit = (left @ right for left, right in (insert_factors(KEY, residual, C, weight) for weight in (None, 2.0)))
    torch.testing.assert_close(memit, 0.6798742 * rome, atol=1e-6, rtol=0)
    keys = torch.cat([KEY, torch.tensor([[0.0], [1], [-1]], dtype=torch.float64)], 1)
    values = torch.tensor([[0.0, 1], [3, 1]], dtype=torch.float64)
    left, right = insert_factors(keys, values - W @ keys, C, 2.0)
    delta = left @ right
    close(delta, [[-0.341447, -0.059211, -1.115132], [0.138816, 0.269737, 0.496711]])
    close(values - (W + delta) @ keys, [[-1.425, 1.944079], [0.825, -0.773026]])


def test_redirection_worked_numbers() -> None:
    protected = torch.eye(4)[:, :2]
    keys = torch.tensor([[0.5], [-1], [2], [1]])
    residuals = torch.tensor([[3.0], [-2], [-1]])
    close(project_out(keys, protected)[:, 0], [0.0, 0, 2, 1])
    left, right = redirect_factors(keys, residuals, protected, 1.0)
    delta = left @ right
    close(delta, [[0, 0, 1, 0.5], [0, 0, -2 / 3, -1 / 3], [0, 0, -1 / 3, -1 / 6]])
    close((delta @ keys.double())[:, 0], [2.5, -5 / 3, -5 / 6])
    assert float(written_share(right, keys)) == pytest.approx(5 / 6)
    assert not delta[:, :2].any()
    keys = torch.cat([keys, torch.tensor([[1.0], [0], [1], [-1]])], 1)
    residuals = torch.cat([residuals, torch.tensor([[0.0], [1], [2]])], 1)
    left, right = redirect_factors(keys, residuals, protected, 1.0)
    close(
        left @ right,
        [[0, 0, 0.882353, 0.705882], [0, 0, -0.352941, -0.882353], [0, 0, 0.176471, -1.058824]],
    )


def drawn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_factors_solve_the_dense_systems() -> None:
    inputs, outputs, count = 12, 7, 3
    keys, residuals, earlier = drawn(inputs, count, seed=1), drawn(outputs, count, seed=2), drawn(inputs, 2, seed=3)
    sample = drawn(inputs, 40, seed=4)
    c = sample @ sample.T / 40
    left, right = insert_factors(keys, residuals, c, 5.0)
    torch.testing.assert_close(left @ right, residuals @ keys.T @ torch.linalg.inv(5 * c + keys @ keys.T))
    # A null space and keys of earlier edits: (P (K K^T + E E^T) + lambda I) X = P K R^T.
    protected = torch.linalg.qr(drawn(inputs, 4, seed=5)).Q
    projector = torch.eye(inputs, dtype=torch.float64) - protected @ protected.T
    left, right = redirect_factors(keys, residuals, protected, 0.3, earlier)
    system = projector @ (keys @ keys.T + earlier @ earlier.T) + 0.3 * torch.eye(inputs, dtype=torch.float64)
    torch.testing.assert_close((left @ right).T, torch.linalg.solve(system, projector @ keys @ residuals.T))
    assert float((left @ right @ protected).abs().max()) < 1e-12
    assert right.shape == (count, inputs)


def test_earlier_keys_are_left_alone() -> None:
    keys, residuals, earlier = drawn(20, 2, seed=6), drawn(5, 2, seed=7), drawn(20, 4, seed=8)
    plain, kept = (redirect_factors(keys, residuals, None, 1e-6, given) for given in (None, earlier))
    assert float((plain[0] @ plain[1] @ earlier).norm()) > 0.1
    assert float((kept[0] @ kept[1] @ earlier).norm()) < 1e-4
    torch.testing.assert_close(kept[0] @ kept[1] @ keys, residuals, atol=1e-4, rtol=0)


def test_whitening_disturbs_ordinary_keys_least() -> None:
    ordinary = drawn(10, 200, seed=9) * torch.linspace(0.1, 3, 10, dtype=torch.float64)[:, None]
    key, residual = drawn(10, 1, seed=10), drawn(4, 1, seed=11)
    whitened = insert_factors(key, residual, ordinary @ ordinary.T / 200, None)
    plain = insert_factors(key, residual, torch.eye(10), None)
    disturbed = [float((left @ right @ ordinary).norm()) for left, right in (whitened, plain)]
    assert disturbed[0] < 0.5 * disturbed[1]
    for left, right in (whitened, plain):
        torch.testing.assert_close(left @ right @ key, residual)


def test_the_released_form_divides_by_the_bare_key() -> None:
    bare = torch.tensor([[1.0], [1], [2]], dtype=torch.float64)
    left, right = insert_factors(KEY, VALUE - W @ bare, C, None, read=bare)
    u = torch.linalg.solve(C, KEY)
    torch.testing.assert_close(left @ right, (VALUE - W @ bare) @ u.T / float((u.T @ bare)[0, 0]))
    torch.testing.assert_close((W + left @ right) @ bare, VALUE)


def test_what_cannot_be_solved_is_an_input_error() -> None:
    twice = torch.cat([KEY, KEY], 1)
    with pytest.raises(InputError, match="cannot be written"):
        insert_factors(twice, torch.ones(2, 2), C, None)
    with pytest.raises(InputError, match="cannot be inverted"):
        insert_factors(KEY, VALUE, torch.zeros(3, 3), None)
    with pytest.raises(InputError, match="cannot be written"):
        redirect_factors(torch.eye(3)[:, :1], torch.ones(2, 1), torch.eye(3)[:, :1], 0.0)
    # A regulariser solves the same system: half of the residual goes to each copy.
    left, right = redirect_factors(torch.eye(3)[:, [0, 0]], torch.ones(2, 2), None, 1e-9)
    close((left @ right)[:, 0], [1.0, 1.0])


def test_a_matrix_is_applied_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(associative, "BLOCK_ENTRIES", 20)
    stored, keys = drawn(7, 9, seed=14).float(), drawn(9, 2, seed=15)
    torch.testing.assert_close(apply_matrix(stored, keys, False), stored.double() @ keys)
    torch.testing.assert_close(apply_matrix(stored.T.contiguous(), keys, True), stored.double() @ keys)


def test_norm_and_orientation() -> None:
    left, right = drawn(5, 2, seed=12), drawn(2, 8, seed=13)
    assert update_norm(left, right) == pytest.approx(float((left @ right).norm()))
    stored = oriented(left, right, transposed=True)
    torch.testing.assert_close(stored[0] @ stored[1], (left @ right).T)
