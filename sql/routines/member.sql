-- Members: which processes run consumers, so that one which dies is noticed.
--
-- A handler that aborts its process leaves no trace in an error handler, and its transaction is rolled back. So a process
-- says that it lives, once a second, and bids farewell when it ends. Of one that does neither any more nobody knows what it
-- was at: every partition of its consumers comes under suspicion (suspicion.sql).
-- The clock only says who is worth suspecting. A process that is taken for dead and lives loses nothing.
--
-- Locks: its own row of members, and those of the dead, which it passes over where somebody else buries them.

create or replace function pgonce.lives(member pgonce.members)
returns boolean
language plpgsql volatile
as $$
begin
  -- The server notices at once when a process ends; behind a pooler only the silence tells.
  return member.beat_at > clock_timestamp() - interval '5 seconds'
    and exists (select from pg_stat_activity a where a.pid = member.pid and a.datname = current_database());
end $$;
comment on function pgonce.lives is 'Internal: whether a process has said lately that it lives, and its connection is there.';

create or replace function pgonce.beat(member_id uuid, consumers text[])
returns setof pgonce.suspected
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  dead pgonce.members;
begin
  insert into pgonce.members as m (member_id, pid, consumers)
  values (beat.member_id, pg_backend_pid(), coalesce(beat.consumers, '{}'))
  on conflict (member_id) do update
  set pid = excluded.pid, consumers = excluded.consumers, beat_at = clock_timestamp();
  for dead in
    select m.* from pgonce.members m where m.member_id <> beat.member_id and not pgonce.lives(m)
    for update skip locked
  loop
    -- Whatever it was at had not been passed, and no batch is longer than 10,000.
    insert into pgonce.suspicions (consumer_id, partition, until_offset, messages)
    select c.consumer_id, o.partition, o.next_offset + 10000, 1000
    from pgonce.consumers c
    join pgonce.consumer_offsets o using (consumer_id)
    where c.consumer = any (dead.consumers) and c.kind = 'transactional'
    on conflict (consumer_id, partition) do nothing;
    -- What has been passed, and stands for a message that is parked only, begins again.
    update pgonce.suspicions s
    set until_offset = passed.next_offset + 10000, messages = 1000, raised_at = clock_timestamp()
    from (
      select s.consumer_id, s.partition, o.next_offset
      from pgonce.suspicions s
      join pgonce.consumer_offsets o using (consumer_id, partition)
      where o.consumer = any (dead.consumers) and s.until_offset <= o.next_offset
      for update of s skip locked) passed
    where s.consumer_id = passed.consumer_id and s.partition = passed.partition;
    delete from pgonce.members m where m.member_id = dead.member_id;
  end loop;
  return query
    select c.consumer
    from pgonce.consumers c
    where c.consumer = any (beat.consumers)
      and exists (select from pgonce.suspicions s where s.consumer_id = c.consumer_id);
end $$;
comment on function pgonce.beat is 'Says that a process lives which runs these consumers; to be repeated every second. Raises a suspicion over the consumers of processes that died. Answers which of these consumers are under one: go on there with take_suspicion.';

create or replace function pgonce.leave(member_id uuid)
returns void
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  -- What it was at has failed by itself, or was dropped: nothing died of it.
  update pgonce.suspicions s set tried_by = null, tried_offset = null where s.tried_by = leave.member_id;
  delete from pgonce.members m where m.member_id = leave.member_id;
end $$;
comment on function pgonce.leave is 'Says that a process ends well.';
