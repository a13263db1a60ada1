"""Tables written by each format's own writer."""

import json
from pathlib import Path

import pandas as pd
from datasets import Dataset
from openpyxl import Workbook


def write_table(folder: Path, suffix: str, columns: dict[str, list], name: str = "table") -> str:
    """The same table in each format; in a workbook all text is text, also what looks like a formula or an error."""
    file = folder / f"{name}{suffix}"
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    if suffix == ".json":
        file.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    if suffix == ".jsonl":
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        file.write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    if suffix in (".csv", ".tsv"):
        pd.DataFrame(columns).to_csv(file, index=False, sep=",\t"[suffix == ".tsv"])
    if suffix == ".xlsx":
        book = Workbook()
        for number, row in enumerate([list(columns), *(row.values() for row in rows)], start=1):
            for column, value in enumerate(row, start=1):
                cell = book.active.cell(number, column, value)
                if isinstance(value, str):
                    cell.data_type = "s"
        book.save(file)
    if suffix == ".parquet":
        Dataset.from_dict(columns).to_parquet(file)
    return str(file)
