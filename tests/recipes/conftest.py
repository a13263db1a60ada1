import pytest
from recipes.place import Place


@pytest.fixture
def place(tmp_path, gemma_folder, bert_folder, policy_adapter, reward_adapter):
    return Place(tmp_path, gemma_folder, bert_folder, policy_adapter, reward_adapter)
