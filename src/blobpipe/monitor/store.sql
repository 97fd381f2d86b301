-- The log of the daily routine. Each block makes the next version of the schema from the one before; `logbook.connect`
-- runs those that a file has not had yet. A block that has been released is never changed: a new one follows it.
-- Times are ISO 8601 in UTC; places are 0-based pixel centres; *_frac is a fraction of the light.

-- version 1

CREATE TABLE runs (  -- one per start of `blobpipe quicklook`: what its rows were judged with
    id INTEGER PRIMARY KEY,
    started TEXT NOT NULL,
    ended TEXT,
    version TEXT NOT NULL,  -- of blobpipe
    model TEXT NOT NULL,  -- file name
    model_sha256 TEXT NOT NULL,
    params_sha256 TEXT NOT NULL,
    catalogue_sha256 TEXT NOT NULL,  -- of the known blobs; empty without a catalogue
    threshold REAL NOT NULL  -- score from which a peak is a detection
) STRICT;

CREATE TABLE images (  -- one per distinct content: the same bytes under two names are one image
    id INTEGER PRIMARY KEY,
    run INTEGER NOT NULL REFERENCES runs,
    sha256 TEXT NOT NULL UNIQUE,
    name TEXT NOT NULL,  -- file name without its suffix
    kind TEXT NOT NULL CHECK (kind IN ('image', 'difference')),
    mjd REAL,  -- of the exposure
    header TEXT NOT NULL DEFAULT '{}',  -- the cards that are kept, JSON
    logged TEXT NOT NULL,
    outcome TEXT NOT NULL CHECK (outcome IN ('searched', 'stack', 'rejected')),  -- stack: too few images before it
    reason TEXT NOT NULL DEFAULT '',
    late INTEGER NOT NULL DEFAULT 0 CHECK (late IN (0, 1)),  -- images of a later date were there already
    shift_x_px REAL,
    shift_y_px REAL,
    noise_frac REAL,
    signal_e REAL,  -- photon level, if the header tells it
    clipped_frac REAL,  -- share of the pixels that clipping changed
    n_stack INTEGER NOT NULL DEFAULT 0,
    stack_sha256 TEXT NOT NULL DEFAULT ''  -- of the stack that was subtracted
) STRICT;
CREATE INDEX images_by_date ON images (mjd);
CREATE INDEX images_by_name ON images (name);

CREATE TABLE files (  -- every file that was met, and what became of it
    id INTEGER PRIMARY KEY,
    path TEXT NOT NULL,
    sha256 TEXT NOT NULL,
    size_bytes INTEGER NOT NULL,
    modified_ns INTEGER NOT NULL,
    seen TEXT NOT NULL,
    outcome TEXT NOT NULL CHECK (outcome IN ('logged', 'duplicate', 'renamed', 'changed')),
    image INTEGER NOT NULL REFERENCES images,  -- changed: another content under a name that was there before
    UNIQUE (path, sha256)
) STRICT;
CREATE INDEX files_by_image ON files (image);

CREATE TABLE subframes (  -- 16 per searched image
    image INTEGER NOT NULL REFERENCES images,
    row INTEGER NOT NULL,
    col INTEGER NOT NULL,
    probability REAL NOT NULL,
    positive INTEGER NOT NULL CHECK (positive IN (0, 1)),
    saliency BLOB NOT NULL,  -- PNG, 8 bit: where in the subframe the network sees a blob
    PRIMARY KEY (image, row, col)
) STRICT;

CREATE TABLE candidates (  -- one per place at which something new was seen
    id INTEGER PRIMARY KEY,
    image INTEGER NOT NULL REFERENCES images,  -- the earliest that shows it
    status TEXT NOT NULL CHECK (status IN ('new', 'confirmed', 'faded')),  -- of persistence; reviews stand apart
    x_px REAL NOT NULL,  -- the blob's usual place: the mirror's shift is taken off
    y_px REAL NOT NULL,
    missed INTEGER NOT NULL DEFAULT 0  -- later images that do not show it, while it is new
) STRICT;
CREATE INDEX candidates_by_image ON candidates (image);

CREATE TABLE detections (  -- what the search found on an image; those of a candidate are its sightings
    id INTEGER PRIMARY KEY,
    image INTEGER NOT NULL REFERENCES images,
    candidate INTEGER REFERENCES candidates,
    status TEXT NOT NULL CHECK (status IN ('new', 'known', 'dip', 'bad_pixels')),
    x_px REAL NOT NULL,  -- on this image
    y_px REAL NOT NULL,
    x_err_px REAL,
    y_err_px REAL,
    radius_px REAL,
    radius_err_px REAL,
    depth_frac REAL,
    depth_err_frac REAL,
    loss_frac_px2 REAL,
    snr REAL,
    score REAL NOT NULL,
    probability REAL NOT NULL  -- that it is a new blob
) STRICT;
CREATE INDEX detections_by_image ON detections (image);
CREATE INDEX detections_by_candidate ON detections (candidate);

CREATE TABLE pictures (
    id INTEGER PRIMARY KEY,
    image INTEGER NOT NULL REFERENCES images,
    detection INTEGER REFERENCES detections,  -- none: of the whole image
    kind TEXT NOT NULL CHECK (kind IN ('difference', 'stack', 'map', 'surface')),
    type TEXT NOT NULL CHECK (type IN ('image/png', 'image/jpeg')),
    bytes BLOB NOT NULL,
    UNIQUE (image, detection, kind)
) STRICT;
CREATE INDEX pictures_by_detection ON pictures (detection);

CREATE TABLE reviews (  -- never changed: the latest of a candidate counts
    id INTEGER PRIMARY KEY,
    candidate INTEGER NOT NULL REFERENCES candidates,
    decision TEXT NOT NULL CHECK (decision IN ('confirmed', 'rejected', 'unsure')),
    reviewer TEXT NOT NULL,
    reason TEXT NOT NULL DEFAULT '',
    at TEXT NOT NULL
) STRICT;
CREATE INDEX reviews_by_candidate ON reviews (candidate);

CREATE TABLE notices (  -- the outbox: written together with what it tells of, sent afterwards
    id INTEGER PRIMARY KEY,
    key TEXT NOT NULL,  -- what it tells of, such as candidate-12-new: never told twice
    channel TEXT NOT NULL CHECK (channel IN ('mail', 'webhook')),
    image INTEGER REFERENCES images,
    candidate INTEGER REFERENCES candidates,
    subject TEXT NOT NULL,
    text TEXT NOT NULL,
    created TEXT NOT NULL,
    state TEXT NOT NULL DEFAULT 'waiting' CHECK (state IN ('waiting', 'sent', 'given_up')),
    attempts INTEGER NOT NULL DEFAULT 0,
    next_attempt TEXT,
    error TEXT NOT NULL DEFAULT '',
    sent TEXT,
    UNIQUE (key, channel)
) STRICT;
CREATE INDEX notices_waiting ON notices (state, next_attempt);

CREATE TABLE identity (  -- of this log: the same in every copy of it, different from every other log
    id TEXT NOT NULL
) STRICT;
INSERT INTO identity VALUES (lower(hex(randomblob(16))));

CREATE TABLE health (  -- readings of the drift monitors after each image
    image INTEGER NOT NULL REFERENCES images,
    what TEXT NOT NULL,
    value REAL NOT NULL,
    bound REAL NOT NULL,  -- the limit it is judged by; of a range, the nearer end
    since INTEGER REFERENCES images,  -- the image that crossed the limit; none while the reading is within
    PRIMARY KEY (image, what)
) STRICT;
CREATE INDEX health_by_what ON health (what, image);

CREATE VIEW candidate_list AS  -- a candidate with its deepest look at it: the sighting of the highest S/N
SELECT c.id, c.status, c.x_px, c.y_px, c.missed, c.image AS first_image, f.name AS first_frame, f.mjd AS first_mjd,
    b.id AS detection, b.image AS best_image, b.radius_px, b.radius_err_px, b.depth_frac, b.depth_err_frac,
    b.loss_frac_px2, b.snr, b.score, b.probability,
    (SELECT count(*) FROM detections d WHERE d.candidate = c.id) AS sightings,
    coalesce((SELECT r.decision FROM reviews r WHERE r.candidate = c.id ORDER BY r.id DESC LIMIT 1), '') AS decision,
    r.model_sha256, r.params_sha256, f.stack_sha256
FROM candidates c
JOIN images f ON f.id = c.image
JOIN runs r ON r.id = f.run
JOIN detections b ON b.id =
    (SELECT d.id FROM detections d WHERE d.candidate = c.id ORDER BY d.snr DESC, d.id LIMIT 1);

-- version 2

-- Only people confirm: a candidate that a later image shows is seen again. A CHECK changes with its table alone; what
-- refers to the table keeps its name, for `store` migrates without foreign keys.
DROP VIEW candidate_list;
CREATE TABLE new_candidates (  -- one per place at which something new was seen
    id INTEGER PRIMARY KEY,
    image INTEGER NOT NULL REFERENCES images,  -- the earliest that shows it
    status TEXT NOT NULL CHECK (status IN ('new', 'seen_again', 'faded')),  -- of persistence; reviews stand apart
    x_px REAL NOT NULL,  -- the blob's usual place: the mirror's shift is taken off
    y_px REAL NOT NULL,
    missed INTEGER NOT NULL DEFAULT 0  -- later images that do not show it, while it is new
) STRICT;
INSERT INTO new_candidates (id, image, status, x_px, y_px, missed)
SELECT id, image, replace(status, 'confirmed', 'seen_again'), x_px, y_px, missed FROM candidates;
DROP TABLE candidates;
ALTER TABLE new_candidates RENAME TO candidates;
CREATE INDEX candidates_by_image ON candidates (image);
UPDATE notices SET key = replace(key, '-confirmed', '-seen_again') WHERE candidate IS NOT NULL;
UPDATE notices
SET subject = replace(subject, 'confirmed blob at', 'blob seen again at'),
    text = replace(text, ', confirmed with the image', ', seen again with the image')
WHERE candidate IS NOT NULL AND state = 'waiting';

CREATE VIEW candidate_list AS  -- a candidate with its deepest look at it: the sighting of the highest S/N
SELECT c.id, c.status, c.x_px, c.y_px, c.missed, c.image AS first_image, f.name AS first_frame, f.mjd AS first_mjd,
    b.id AS detection, b.image AS best_image, b.radius_px, b.radius_err_px, b.depth_frac, b.depth_err_frac,
    b.loss_frac_px2, b.snr, b.score, b.probability,
    (SELECT count(*) FROM detections d WHERE d.candidate = c.id) AS sightings,
    coalesce((SELECT r.decision FROM reviews r WHERE r.candidate = c.id ORDER BY r.id DESC LIMIT 1), '') AS decision,
    r.model_sha256, r.params_sha256, f.stack_sha256
FROM candidates c
JOIN images f ON f.id = c.image
JOIN runs r ON r.id = f.run
JOIN detections b ON b.id =
    (SELECT d.id FROM detections d WHERE d.candidate = c.id ORDER BY d.snr DESC, d.id LIMIT 1);
UPDATE notices SET key = 'digest-week-' || substr(key, 8)  -- a day's digest and that of the week had the same key
WHERE key LIKE 'digest-%' AND subject LIKE 'blobpipe: digest of % to %';

CREATE TABLE corrections (  -- of each image that a stack has taken: what moves its blobs to their usual place
    image INTEGER PRIMARY KEY REFERENCES images,
    bytes BLOB NOT NULL  -- from `stacks.correction`; empty: they are there
) STRICT;

-- Of one exposure, one version counts. Sightings of the others no longer have their candidate, unless it is their only one.
ALTER TABLE images ADD COLUMN superseded_by INTEGER REFERENCES images;  -- a newer version of the same exposure
CREATE INDEX images_superseded ON images (superseded_by) WHERE superseded_by IS NOT NULL;

ALTER TABLE images ADD COLUMN nx_px INTEGER;  -- size of the image; NULL if it could not be read, or was logged by version 1
ALTER TABLE images ADD COLUMN ny_px INTEGER;
ALTER TABLE files ADD COLUMN changed_ns INTEGER;  -- with the inode: a file of the same size and time is another one
ALTER TABLE files ADD COLUMN inode INTEGER;

-- version 3

-- Files of bad pixels that a run was given: JSON, a list of file, n_px, sha256; '[]' without one.
ALTER TABLE runs ADD COLUMN bad_pixels TEXT NOT NULL DEFAULT '[]';

-- version 4

-- The operating point of `blobpipe calibrate` that replaced the model's threshold, and what it promises.
ALTER TABLE runs ADD COLUMN operating_point_sha256 TEXT NOT NULL DEFAULT '';  -- of its file; empty without one
ALTER TABLE runs ADD COLUMN false_alarms_per_100 REAL;  -- promised on 100 images; NULL without one

CREATE TABLE peaks (  -- what the search takes for new on an image, from the lowest score on that it looks at
    image INTEGER NOT NULL REFERENCES images,
    x_px REAL NOT NULL,  -- usual place: the mirror's shift is taken off
    y_px REAL NOT NULL,
    score REAL NOT NULL
) STRICT;
CREATE INDEX peaks_by_image ON peaks (image);
ALTER TABLE images ADD COLUMN n_peaks INTEGER;  -- rows of peaks; NULL: not searched, or logged by an earlier version

-- version 5

-- The detector whose images a run has searched, as its file described it: JSON; empty: WFC3/IR, as in earlier versions.
ALTER TABLE runs ADD COLUMN detector TEXT NOT NULL DEFAULT '';

-- version 6

-- The latest images together: what they show that no single one does, and when it landed.
ALTER TABLE detections ADD COLUMN n_images INTEGER NOT NULL DEFAULT 1;  -- latest images in whose mean it was found
CREATE TABLE depths (  -- of each candidate on each image, its place and shape fixed
    image INTEGER NOT NULL REFERENCES images,
    candidate INTEGER NOT NULL REFERENCES candidates,
    depth_frac REAL NOT NULL,
    depth_err_frac REAL NOT NULL,
    PRIMARY KEY (image, candidate)
) STRICT;
CREATE INDEX depths_by_candidate ON depths (candidate);
ALTER TABLE candidates ADD COLUMN history TEXT NOT NULL DEFAULT '';  -- what its depths say: landed, nothing, ...; empty: too few
ALTER TABLE candidates ADD COLUMN after_mjd REAL;  -- landing: interval of 90 %
ALTER TABLE candidates ADD COLUMN before_mjd REAL;
ALTER TABLE candidates ADD COLUMN level_frac REAL;  -- depth before the landing, and the step of it
ALTER TABLE candidates ADD COLUMN step_frac REAL;
ALTER TABLE candidates ADD COLUMN step_err_frac REAL;

-- version 7

-- A decision can be withdrawn (a review without one), and people add blobs that the search has missed.
DROP VIEW candidate_list;
CREATE TABLE new_reviews (  -- never changed: the latest of a candidate counts
    id INTEGER PRIMARY KEY,
    candidate INTEGER NOT NULL REFERENCES candidates,
    decision TEXT NOT NULL CHECK (decision IN ('confirmed', 'rejected', 'unsure', '')),  -- empty: undecided again
    reviewer TEXT NOT NULL,
    reason TEXT NOT NULL DEFAULT '',
    at TEXT NOT NULL
) STRICT;
INSERT INTO new_reviews SELECT id, candidate, decision, reviewer, reason, at FROM reviews;
DROP TABLE reviews;
ALTER TABLE new_reviews RENAME TO reviews;
CREATE INDEX reviews_by_candidate ON reviews (candidate);

ALTER TABLE candidates ADD COLUMN added_by TEXT NOT NULL DEFAULT '';  -- person who saw it; empty: the search found it
ALTER TABLE runs ADD COLUMN catalogue TEXT NOT NULL DEFAULT '';  -- path of the table of known blobs; empty without one

-- A candidate with its deepest look at it, the sighting of the highest S/N. Its probability is the mean over the
-- sightings that were judged new: whatever the sightings have in common, a mean of calibrated probabilities stays calibrated.
CREATE VIEW candidate_list AS
SELECT c.id, c.status, c.x_px, c.y_px, c.missed, c.image AS first_image, f.name AS first_frame, f.mjd AS first_mjd,
    b.id AS detection, b.image AS best_image, b.radius_px, b.radius_err_px, b.depth_frac, b.depth_err_frac,
    b.loss_frac_px2, b.snr, b.score,
    coalesce((SELECT avg(d.probability) FROM detections d WHERE d.candidate = c.id AND d.status = 'new'),
        b.probability) AS probability,
    (SELECT count(*) FROM detections d WHERE d.candidate = c.id) AS sightings,
    coalesce(v.decision, '') AS decision, coalesce(v.reviewer, '') AS reviewer, v.at AS reviewed, c.added_by,
    r.model_sha256, r.params_sha256, f.stack_sha256,
    (SELECT d.n_images FROM detections d WHERE d.candidate = c.id ORDER BY d.id LIMIT 1) AS n_images,
    c.history, c.after_mjd, c.before_mjd, c.level_frac, c.step_frac, c.step_err_frac
FROM candidates c
JOIN images f ON f.id = c.image
JOIN runs r ON r.id = f.run
JOIN detections b ON b.id =
    (SELECT d.id FROM detections d WHERE d.candidate = c.id ORDER BY d.snr DESC, d.id LIMIT 1)
LEFT JOIN reviews v ON v.id = (SELECT max(id) FROM reviews WHERE candidate = c.id);

-- version 8

CREATE TABLE nearly_found (  -- what the latest images show together, landed and there since, just below the threshold
    image INTEGER NOT NULL REFERENCES images,  -- the newest of them
    x_px REAL NOT NULL,  -- usual place
    y_px REAL NOT NULL,
    radius_px REAL NOT NULL,
    n_images INTEGER NOT NULL,  -- latest images in whose mean it is clearest
    snr REAL NOT NULL,
    score REAL NOT NULL
) STRICT;
CREATE INDEX nearly_found_by_image ON nearly_found (image);

-- version 9

-- Image with which the depths of a candidate, until then new, told that it landed and stayed; NULL: they did not, or an
-- image had shown it again before.
ALTER TABLE candidates ADD COLUMN stays_image INTEGER REFERENCES images;
CREATE INDEX candidates_by_stays_image ON candidates (stays_image) WHERE stays_image IS NOT NULL;
