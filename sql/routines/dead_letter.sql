-- Dead letters: what a consumer has given up, and what an operator makes of it.
--
-- Locks: the offset locks of their partitions, ascending; it waits for whoever is there. Of two operators who settle the same one, the
-- second finds it settled. READ COMMITTED only, so that it sees that.
-- Indexes: the primary key of dead_letters.

create or replace function pgonce.lock_dead_letters(dead_letter_ids bigint[])
returns bigint[]
language plpgsql volatile
as $$
#variable_conflict use_column
declare
  places constant pgonce.consumer_partitions[] := array(
    select p from pgonce.consumer_partitions p
    where (p.consumer_id, p.partition) in (
      select d.consumer_id, d.partition from pgonce.dead_letters d where d.dead_letter_id = any (dead_letter_ids))
    order by p.consumer_id, p.partition
    for no key update);
begin
  -- Looked at again under the locks: a restore may have brought some back, of partitions that are not locked.
  return array(
    select d.dead_letter_id from pgonce.dead_letters d
    join unnest(places) l on l.consumer_id = d.consumer_id and l.partition = d.partition
    where d.dead_letter_id = any (dead_letter_ids));
end $$;
comment on function pgonce.lock_dead_letters is 'Internal: takes the offset locks of the partitions of dead letters; answers those that may be settled under them.';

create or replace function pgonce.replay_dead_letters(dead_letter_ids bigint[])
returns setof pgonce.settled
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  target record;
  locked bigint[];
  settled bigint[] := '{}';
begin
  perform pgonce.require_read_committed('replay_dead_letters');
  locked := pgonce.lock_dead_letters(dead_letter_ids);
  for target in
    with replayed as (
      update pgonce.dead_letters d
      set state = 'replayed', settled_at = clock_timestamp(), settled_by = session_user
      where d.dead_letter_id = any (locked) and d.state = 'dead'
      returning d.*
    ),
    parked as (
      -- Due at once, unless one of its key is parked before it; what is parked behind it waits for it.
      insert into pgonce.parked (
        "offset", enqueued_at, due_at, consumer_id, partition, attempts, bytes, message_id, key, error, payload, headers)
      select r."offset", r.enqueued_at, clock_timestamp(), r.consumer_id, r.partition, 0, r.bytes, r.message_id, r.key,
             r.error, r.payload, r.headers
      from replayed r
    )
    select c.consumer_id, r.partition, c.failure_policy, array_agg(r.key) as keys, array_agg(r.dead_letter_id) as ids
    from replayed r
    join pgonce.consumers c using (consumer_id)
    group by c.consumer_id, r.partition, c.failure_policy
  loop
    settled := settled || target.ids;
    if target.failure_policy = 'park_key' then
      perform pgonce.hold_back(target.consumer_id, target.partition, target.keys);
    end if;
    -- Whoever receives with an older snapshot does not see these, and would make one due that waits behind them.
    perform pgonce.append_progress(pgonce.newest_progress(target.consumer_id, target.partition));
  end loop;
  return query select i, i = any (settled) from unnest(dead_letter_ids) i;
end $$;
comment on function pgonce.replay_dead_letters is 'Gives dead letters back to their consumers, each with its id, its place in the order of its key and a fresh count of attempts. Waits for whoever is at their partitions. Answers for each whether it was this call that did it. Errors: PO010 (READ COMMITTED only).';

create or replace function pgonce.discard_dead_letters(dead_letter_ids bigint[])
returns setof pgonce.settled
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  locked bigint[];
begin
  perform pgonce.require_read_committed('discard_dead_letters');
  locked := pgonce.lock_dead_letters(dead_letter_ids);
  return query
    with discarded as (
      update pgonce.dead_letters d
      set state = 'discarded', settled_at = clock_timestamp(), settled_by = session_user
      where d.dead_letter_id = any (locked) and d.state = 'dead'
      returning d.dead_letter_id
    )
    select i, exists (select from discarded d where d.dead_letter_id = i) from unnest(dead_letter_ids) i;
end $$;
comment on function pgonce.discard_dead_letters is 'Settles dead letters for good: they are never applied. Their rows stay, and say who did it and when. Waits for whoever is at their partitions. Answers for each whether it was this call that did it. Errors: PO010 (READ COMMITTED only).';
