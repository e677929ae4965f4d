"""Writes an invoice for each order, exactly once, until SIGTERM or Ctrl-C.

Receiving and the effect are one transaction. A message that fails is rolled back to a savepoint and tried again later; the
others are applied. Any number of these may run. One that is killed, or loses its connection, leaves nothing half done:
start it again.

Usage: consumer.py, with DATABASE_URL in the environment.
"""

import os
import signal
import threading

import psycopg

# Every row that receive returns counts as applied, unless fail takes it back.
RECEIVE = """select partition, "offset", payload from pgonce.receive('invoices-python', max => 100)"""
APPLY = "insert into invoices (consumer, order_id) values ('invoices-python', %s)"
FAIL = "select withdrawn from pgonce.fail('invoices-python', %s, %s, %s)"
# What a message is to blame for. Anything else, such as a lost connection, ends the program, and the batch comes again.
FAULTS = (psycopg.DataError, psycopg.IntegrityError, KeyError)
# How long to wait where there was nothing to do, in seconds.
PAUSE = 0.1


def apply_batch(connection: psycopg.Connection) -> tuple[int, int]:
    """Answers how many messages it received, and how many of these it applied."""
    with connection.transaction():
        messages = connection.execute(RECEIVE).fetchall()
        # What failed, and what may not overtake it.
        withdrawn: set[int] = set()
        for partition, offset, payload in messages:
            if offset in withdrawn:
                continue
            try:
                with connection.transaction():  # a savepoint
                    connection.execute(APPLY, (payload["order"],))
            except FAULTS as error:
                withdrawn.update(connection.execute(FAIL, (partition, offset, str(error))).fetchone()[0])
    return len(messages), len(messages) - len(withdrawn)


def main() -> None:
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())

    applied = 0
    with psycopg.connect(os.environ["DATABASE_URL"], autocommit=True) as connection:
        while not stop.is_set():
            received, batch = apply_batch(connection)
            applied += batch
            if received == 0:
                stop.wait(PAUSE)
    print(f"{applied} invoices written")


if __name__ == "__main__":
    main()
