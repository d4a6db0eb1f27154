"""How reports are laid out."""

from hap_hf.report.tables import plain_text


def test_names_stay_in_one_piece_where_there_is_room():
    numbers = ("heads 72 -> 53, ffn 9,216 -> 3,519", "590.98 k (100.0%)", "20.30 M (100.0%)", "1,172")
    columns = ("group", "units", "parameters left", "MACs left", "uncertain")
    name = "bert.encoder.layer.11.attention.self:heads"
    text = plain_text([], columns, [(name, *numbers)])
    assert f"| {name} |" in text
    assert max(map(len, text.splitlines())) <= 120
    folded = plain_text([], columns, [(name * 2, *numbers)])
    assert name * 2 not in folded
    assert max(map(len, folded.splitlines())) <= 120
    assert numbers[1] in folded
