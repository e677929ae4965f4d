select pgonce.finish_handover($1, $2, failed => $3, errors => $4, untried => $5) as is_finished
