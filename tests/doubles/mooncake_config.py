"""Stands in for Mooncake's configuration (mooncakes.py): a JSON file, or variables, as its users
write them."""

import json
import os
from dataclasses import dataclass
from typing import Any

UNITS = {"kb": 1 << 10, "mb": 1 << 20, "gb": 1 << 30}


def size(text: Any) -> int:
    word = str(text).strip().lower()
    return int(float(word[:-2]) * UNITS[word[-2:]]) if word[-2:] in UNITS else int(word)


@dataclass
class MooncakeConfig:
    local_hostname: str
    metadata_server: str
    global_segment_size: int
    local_buffer_size: int
    protocol: str
    device_name: str | None
    master_server_address: str
    tenant_id: str = "default"

    @staticmethod
    def of(told: dict[str, Any]) -> "MooncakeConfig":
        for field in ("local_hostname", "metadata_server", "master_server_address"):
            if not told.get(field):
                raise ValueError(f"Missing required config field: {field}")
        return MooncakeConfig(
            told["local_hostname"],
            told["metadata_server"],
            size(told.get("global_segment_size", "3gb")),
            size(told.get("local_buffer_size", "1gb")),
            told.get("protocol", "tcp"),
            told.get("device_name", ""),
            told["master_server_address"],
            told.get("tenant_id", "default"),
        )

    @staticmethod
    def from_file(file_path: str) -> "MooncakeConfig":
        with open(file_path) as file:
            return MooncakeConfig.of(json.load(file))

    @staticmethod
    def load_from_env() -> "MooncakeConfig":
        if path := os.getenv("MOONCAKE_CONFIG_PATH"):
            return MooncakeConfig.from_file(path)
        told = {
            "local_hostname": os.getenv("MOONCAKE_LOCAL_HOSTNAME", "localhost"),
            "metadata_server": os.getenv("MOONCAKE_TE_META_DATA_SERVER", "P2PHANDSHAKE"),
            "global_segment_size": os.getenv("MOONCAKE_GLOBAL_SEGMENT_SIZE", "3gb"),
            "local_buffer_size": os.getenv("MOONCAKE_LOCAL_BUFFER_SIZE", "1gb"),
            "protocol": os.getenv("MOONCAKE_PROTOCOL", "tcp"),
            "device_name": os.getenv("MOONCAKE_DEVICE", ""),
            "master_server_address": os.getenv("MOONCAKE_MASTER"),
            "tenant_id": os.getenv("MOONCAKE_TENANT_ID", "default"),
        }
        return MooncakeConfig.of(told)
