create table pgonce.documents (
  document_id text primary key,
  words integer not null
);
comment on table pgonce.documents is 'The business rows of the demo: one for each document whose words were sent.';
