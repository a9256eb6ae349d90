"""Problems as rows: what is fed, what is predicted, what is refused."""

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from mmada.data import IGNORE_INDEX
from mmada.data.task_rows import TaskRows, answer_ids, padding_id, prompt_ids
from mmada.data.tasks import TaskItem, TaskSource, load_tasks
from mmada.errors import DataError
from mmada.tokenizer import BEGIN_OF_TEXT_ID, END_OF_TEXT_ID, PAD_ID, ByteTokenizer

BYTES = ByteTokenizer()


def item(prompt: str, answer: str | None, index: int = 0) -> TaskItem:
    return TaskItem(index, "made_up", prompt, answer, {})


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> PreTrainedTokenizerFast:
    """A tokenizer of words that puts [CLS] in front of a text and its end behind, and has no padding."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocabulary = {"[CLS]": 0, "[END]": 1, "[UNK]": 2, "two": 3, "and": 4, "four": 5}
    own = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    own.pre_tokenizer = pre_tokenizers.Whitespace()
    own.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [END]", special_tokens=[("[CLS]", 0), ("[END]", 1)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=own, bos_token="[CLS]", eos_token="[END]", unk_token="[UNK]")


def test_a_row_is_begin_prompt_answer_end_padding_and_labels_only_the_answer():
    batch = TaskRows([item("a+", "42")], BYTES, 8).batch(np.array([0]))
    a, plus, four, two = (byte + 8 for byte in b"a+42")
    assert batch["input_ids"].tolist() == [[BEGIN_OF_TEXT_ID, a, plus, four, two, END_OF_TEXT_ID, PAD_ID, PAD_ID]]
    ignored = IGNORE_INDEX
    assert batch["shift_labels"].tolist() == [[ignored, ignored, four, two, END_OF_TEXT_ID, ignored, ignored, ignored]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1, 1, 0, 0]]


def test_rows_come_in_the_order_asked_for_and_are_counted_in_bytes_and_targets():
    rows = TaskRows([item("x", "7", 0), item("longer", "é", 1)], BYTES, 16)
    batch = rows.batch(np.array([1, 0, 1]))
    assert torch.equal(batch["input_ids"][0], batch["input_ids"][2])
    assert batch["attention_mask"].sum(dim=1).tolist() == [10, 4, 10]
    assert (len(rows), rows.num_targets, rows.num_answer_bytes) == (2, 5, 3)
    assert (rows.longest_prompt, rows.longest_completion) == (7, 3)
    with pytest.raises(IndexError):
        rows.batch(np.array([2]))


def test_an_end_that_a_tokenizer_puts_behind_texts_is_not_behind_prompts(words):
    assert words("two and")["input_ids"] == [0, 3, 4, 1]
    assert prompt_ids(words, "two and") == [0, 3, 4]
    assert answer_ids(words, "four") == [5, 1]
    assert padding_id(words) == 1  # masked, so its end does
    assert prompt_ids(BYTES, "hi") == [BEGIN_OF_TEXT_ID, *(byte + 8 for byte in b"hi")]


def test_a_saved_tokenizer_gives_the_same_prompts(tmp_path):
    import mmada.model  # noqa: F401  (registers the family)
    from mmada.config import MMaDAConfig

    MMaDAConfig().save_pretrained(tmp_path)
    BYTES.save_pretrained(tmp_path)
    assert prompt_ids(AutoTokenizer.from_pretrained(tmp_path), "é?") == prompt_ids(BYTES, "é?")


def test_what_does_not_fit_is_refused_with_its_length():
    exact = TaskRows([item("abc", "12")], BYTES, 7)
    assert exact.batch(np.array([0]))["attention_mask"].sum() == 7
    with pytest.raises(DataError, match=r"train.sequence_length=6 is too short for problem 3 .*takes 7 tokens.*use 7"):
        TaskRows([item("a", "1"), item("abc", "12", 3)], BYTES, 6)


def test_families_without_answers_are_refused_by_name():
    source = TaskSource("rush_hour", size=2, held_out=1)
    with pytest.raises(DataError, match="tasks.family=rush_hour stores no answers"):
        TaskRows(load_tasks(source).train, BYTES, 2048)


def test_a_tokenizer_without_an_end_is_refused(words):
    endless = PreTrainedTokenizerFast(tokenizer_object=words.backend_tokenizer, unk_token="[UNK]")
    with pytest.raises(DataError, match="no end-of-text token"):
        answer_ids(endless, "four")
