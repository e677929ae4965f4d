-- By its turn a batch is found again whose COMMIT was not answered.
insert into pgonce_node.turns as taken (process, turn) values ($1, $2)
on conflict (process) do update
set turn = excluded.turn, taken_at = excluded.taken_at
where taken.turn < excluded.turn
