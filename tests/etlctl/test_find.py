"""From values to masks and rows."""
import json


def test_a_value_is_masked_under_every_key_of_the_ring(world):
    assert world.json("mask", "--field", "ip", "199.172.111.135") == [{"key": "", "cipher": "aes-cbc", "active": True, "mask": "FGV999l/wJpqUDVxPK7Ouw=="}]
