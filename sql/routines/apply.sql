-- Apply: the statements of an sql consumer over the view `received`, in the transaction that opened the batch.
--
-- Both functions run with the rights of the caller, and the statements find what the caller's search_path shows.
-- Locks: none of its own; those of fail, of which the caller holds the only one already.

create or replace function pgonce.apply_statements(statements text)
returns void
language plpgsql volatile
as $$
begin
  execute statements;
end $$;
comment on function pgonce.apply_statements is 'Runs the statements of an sql consumer, with the rights and the search_path of the caller, each with a snapshot of its own. COMMIT and ROLLBACK fail in here: what was received commits together with all of its effect, or not at all.';

create or replace function pgonce.try_statements(
  consumer text,
  partition integer,
  offsets bigint[],
  statements text,
  path text default current_setting('search_path'))
returns setof pgonce.tried
language plpgsql volatile
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  ranges integer[] := array[1, cardinality(offsets)];
  first integer;
  last integer;
  state text;
  message text;
  failure pgonce.failed;
  answer pgonce.tried := (0, '{}');
begin
  while cardinality(ranges) > 0 loop
    -- The first range comes first: a key keeps its order.
    first := ranges[1];
    last := ranges[2];
    ranges := ranges[3:];
    -- Over no message at all the statements may fail as well, and nobody is to blame.
    continue when offsets[first:last] <@ answer.withdrawn;
    perform set_config('pgonce_batch.first_offset', offsets[first]::text, true),
            set_config('pgonce_batch.last_offset', offsets[last]::text, true);
    begin
      -- A failure puts back the path, with all else.
      perform set_config('search_path', path, true);
      execute statements;
      perform set_config('search_path', 'pg_catalog, pg_temp', true);
    exception when others then
      get stacked diagnostics state = returned_sqlstate, message = message_text;
      if state in ('40001', '40P01', '55P03', '25006')
        or left(state, 2) in ('08', '0A', '2D', '3D', '3F', '42', '53', '57', '58', 'F0', 'XX') then
        -- No message is to blame: the connection, the server, another transaction, or the statements themselves.
        raise;
      elsif first < last then
        ranges := array[first, (first + last) / 2, (first + last) / 2 + 1, last] || ranges;
      else
        select f.* into strict failure from pgonce.fail(consumer, partition, offsets[first], message || ' (' || state || ')') f;
        answer.failed := answer.failed + 1;
        answer.withdrawn := answer.withdrawn || failure.withdrawn;
      end if;
    end;
  end loop;
  return next answer;
end $$;
comment on function pgonce.try_statements is 'Runs the statements of an sql consumer over some messages of the batch that is open. Where they fail, it halves, until it knows which messages fail by themselves, and calls fail for these. Answers how many they are, and what the transaction has no longer received. path is what the statements find their tables by.';
