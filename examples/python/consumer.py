"""Writes an invoice for each order, exactly once, until SIGTERM or Ctrl-C.

Receiving and the effect are one statement, and so one transaction; the payloads never leave the server. Any number of
these may run. One that is killed, or loses its connection, leaves nothing half done: start it again.

Usage: consumer.py, with DATABASE_URL in the environment.
"""

import os
import signal
import threading

import psycopg

# Every row that receive returns counts as applied: no filter, and no join that drops rows.
APPLY = """
    with received as materialized (select * from pgonce.receive('invoices-python', max => 100))
    insert into invoices (consumer, order_id)
    select consumer, (payload ->> 'order')::bigint
    from received
"""
# How long to wait where there was nothing to do, in seconds.
PAUSE = 0.1


def main() -> None:
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())

    applied = 0
    with psycopg.connect(os.environ["DATABASE_URL"], autocommit=True) as connection:
        while not stop.is_set():
            batch = connection.execute(APPLY).rowcount
            applied += batch
            if batch == 0:
                stop.wait(PAUSE)
    print(f"{applied} invoices written")


if __name__ == "__main__":
    main()
