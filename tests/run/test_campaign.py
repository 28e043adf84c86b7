"""Six SIGKILLs at random moments over real runs; `make soak` does two hundred, under the real launcher."""

import campaign


def test_nothing_is_lost_to_six_kills(text, domain, tmp_path):
    """A trunk in one process on a slow disk, a module in two: resumed until they end, they equal runs without a kill."""
    cells = [campaign.Cell("train_shared", 1, True), campaign.Cell("train_module", 2, False)]
    total = campaign.campaign(tmp_path, text, domain, cells, steps=8, kills=6, a_run=(3, 3), workers=1, forked=True)
    print(total.table())
    assert total.kills >= 6 and total.finals >= 2
    assert total.faults() == 0, total.table()
