-- What the naive side of the scenarios has: a queue that is a table, and nothing else.
create schema pgonce;
create table pgonce.plain_queue (
  id bigint generated always as identity primary key,
  payload jsonb not null
);
comment on table pgonce.plain_queue is 'The naive queue of a scenario: a message is a row, and to acknowledge it deletes the row.';
