"""Places orders. An order and the message about it exist together or not at all.

Usage: producer.py FIRST COUNT, with DATABASE_URL in the environment.
"""

import os
import sys

import psycopg
from psycopg.types.json import Jsonb

ENQUEUE = """
    select was_duplicate
    from pgonce.enqueue('orders', %(payload)s, key => %(key)s, message_id => %(message_id)s)
"""


def place_order(connection: psycopg.Connection, order: int) -> bool:
    """Places an order, and answers whether it was new. Safe to repeat when in doubt."""
    with connection.transaction():
        connection.execute(
            "insert into orders (id, placed_by) values (%s, 'python') on conflict (id) do nothing", (order,)
        )
        message = {"payload": Jsonb({"order": order}), "key": str(order), "message_id": f"order-{order}-placed"}
        (was_duplicate,) = connection.execute(ENQUEUE, message).fetchone()
    return not was_duplicate


def main() -> None:
    first, count = int(sys.argv[1]), int(sys.argv[2])
    with psycopg.connect(os.environ["DATABASE_URL"], autocommit=True) as connection:
        placed = sum(place_order(connection, order) for order in range(first, first + count))
    print(f"{placed} orders placed, {count - placed} known")


if __name__ == "__main__":
    main()
